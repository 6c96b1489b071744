"""The curve of an adapter: what it learnt and forgot at several values of its dial, for the price of about one."""
