"""What a run says about itself: ``report.json`` and the table on the screen."""
