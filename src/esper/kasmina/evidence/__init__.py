"""Evidence that growth pays: looks at all places at once, and the tests they are put to."""
