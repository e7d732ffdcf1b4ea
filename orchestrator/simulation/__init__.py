"""What a pipeline would cost and when it would end on machines that come and go (`orchestrator simulate`)."""
