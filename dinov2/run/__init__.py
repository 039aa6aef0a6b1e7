"""Job submission to a cluster or to this machine; the entry scripts hold no logic of their own."""
