"""The report of compiled graphs as one page of HTML: its losses, each graph before and after, its kernels."""
