"""What is looked at while a run goes on: the quality of the features, and which iteration to ship."""
