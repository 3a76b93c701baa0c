"""What an adapter folder holds, and which tensors of a base checkpoint it changes."""
