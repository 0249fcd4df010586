"""What a run did: reports, activity, counts."""
