"""What every solver shares: the contract, features, stopping, results, linear programmes, knapsack.

May import `problems` alone.
"""
