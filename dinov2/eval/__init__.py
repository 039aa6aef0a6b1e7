"""Judging a frozen backbone: k-NN, a linear probe and logistic regression on labelled images."""
