"""How fast the service is, beside its peers and beside the bare work: `make bench`."""
