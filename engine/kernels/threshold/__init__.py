"""The smallest weight that top-k, top-p and min-p keep, row by row, without a sort and without a look at the host."""
