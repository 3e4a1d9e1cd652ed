"""Show traces: one token's experts in a page of HTML that opens offline, all of it as JSON. Imports no model."""
