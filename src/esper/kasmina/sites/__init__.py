"""From a recording to the places that can grow, and a reason for each that cannot."""
