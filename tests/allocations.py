"""What torch's CPU allocator is asked for, and matrix products: counted, and so the same on every machine."""

from torch.profiler import ProfilerActivity, profile

PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"))


class Allocations:
    """Records a `with` block: the peak of the live bytes, the largest allocation, the number of matrix products.

    A profiler and not a dispatch mode: under a mode Dynamo would skip the functions that are compiled.
    """

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *exc):
        self.profile.__exit__(*exc)
        events = sorted(self.profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        live = self.peak = self.largest = self.products = 0
        for event in events:
            self.products += event.name() in PRODUCTS
            if event.name() == "[memory]":
                live += event.nbytes()
                self.peak = max(self.peak, live)
                self.largest = max(self.largest, event.nbytes())
