"""A sweep of architectures at their smallest: do they all compile, is any result wrong, how much of them is sparse?"""
