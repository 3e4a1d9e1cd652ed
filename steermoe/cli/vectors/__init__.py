"""`steermoe vectors`: the group of commands about vectors."""
