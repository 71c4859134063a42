"""The adapter store: identities, plans, PEFT files, admission, the durable catalogue and its blobs."""
