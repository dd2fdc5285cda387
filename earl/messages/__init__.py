"""What people read: errors, hints, progress; and what must not be shown."""
