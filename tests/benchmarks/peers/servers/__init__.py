"""One script per server that ours is compared with. Two of them run in environments of their own."""
