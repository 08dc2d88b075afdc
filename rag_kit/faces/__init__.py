"""What people and programs touch: thin, without logic that a notebook could not call."""
