"""What a learned block solver may train."""
