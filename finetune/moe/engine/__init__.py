"""How the experts of a layer are computed: one autograd function over rows sorted by expert."""
