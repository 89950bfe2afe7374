"""Tests of the service, through HTTP and the command line first."""
