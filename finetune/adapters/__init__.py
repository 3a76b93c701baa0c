"""Between base model and merge: what an adapter folder holds, and which tensors of a base on disk it changes how."""
