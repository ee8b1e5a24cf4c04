"""What a run tells: terminal lines, metrics for trackers, the page with its charts."""
