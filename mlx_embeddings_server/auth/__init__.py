"""Who calls, and what he may do: nobody asks, one key for all, or a token for each."""
