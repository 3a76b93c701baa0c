"""The computation of a layer's experts: one autograd function over rows sorted by expert."""
