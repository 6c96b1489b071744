"""reply_matching"""
