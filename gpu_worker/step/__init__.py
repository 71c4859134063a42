"""What the layers of one step share."""
