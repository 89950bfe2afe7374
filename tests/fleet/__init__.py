"""Three real replicas behind a real balancer: restarts, deaths, stalls and overload."""
