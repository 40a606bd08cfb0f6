"""The network of a federation in the field: links of the clients, and a virtual clock that runs on them."""
