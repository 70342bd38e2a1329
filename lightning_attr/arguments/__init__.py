"""Arguments: each is checked where it is given, and named with what was expected and what came."""
