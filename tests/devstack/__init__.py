"""Tests of the local servers, of `interview-access up` and of the demo."""
