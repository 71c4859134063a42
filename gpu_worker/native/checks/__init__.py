"""What tells a broken model, device or request from a working one."""
