"""The wire contract as strangers meet it: every bad input, from another process, over a real socket."""
