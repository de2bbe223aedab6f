"""What the network is made of when it runs: packed and native modules for its three seams, and the table that swaps them in."""
