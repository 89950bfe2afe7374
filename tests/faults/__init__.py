"""Promises under load, faults and attack: each file can be run alone and prints its figures."""
