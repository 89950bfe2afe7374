"""One small server per peer, each as its own documentation recommends for production."""
