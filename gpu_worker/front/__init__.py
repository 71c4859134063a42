"""What both engines share: requests, their rows, the queue, and the way of their text to the client."""
