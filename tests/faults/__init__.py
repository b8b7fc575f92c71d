"""The promises while servers, networks and processes fail: each fault is made, then made good."""
