"""What runs when: plan, ledger, lease, attempts."""
