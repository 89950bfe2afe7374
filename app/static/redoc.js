// Redoc over the service's own OpenAPI document.

const nonce = document.currentScript.nonce; // lets Redoc add its styles, and nobody else
document.body.style.margin = "0";
Redoc.init("openapi.json", { nonce, disableSearch: true }, document.getElementById("redoc"));
