"""What a checkpoint says of its attention, without its weights."""
