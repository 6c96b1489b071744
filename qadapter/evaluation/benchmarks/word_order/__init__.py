"""Which of four texts has its words in order?"""
