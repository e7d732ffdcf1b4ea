"""The self-supervised stages: `pretrain`, `gram_anchor` and `high_res`."""
