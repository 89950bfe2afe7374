// Swagger UI over the service's own OpenAPI document.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null, // or it would ask a foreign host
});
