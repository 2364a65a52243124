"""What both recipes share: what was looked at, told, allowed, checked and committed."""
