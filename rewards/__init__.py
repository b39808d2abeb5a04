"""Rewards: functions of the clean image. Depends on torch only."""
