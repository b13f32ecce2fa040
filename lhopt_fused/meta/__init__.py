"""Learning the policy: tasks, environment, reward and PPO."""
