"""A few samples go the whole way, several ways, before numbers are believed."""
