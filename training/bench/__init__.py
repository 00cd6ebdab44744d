"""`vae-train bench`: our training and evaluation against other people's, same networks, data, threads and machine.

Every contestant runs the code that its users run, in a process of its own, and stops at the end of each epoch
until it is its turn again. So the epochs alternate, whatever else the machine does hits all of them, and no
package of one contestant is in the way of another.
"""
