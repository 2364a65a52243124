"""What ``grow`` is given, checked and read before anything is touched."""
