"""SparseLLM: a block's MLP pruned as one problem."""
